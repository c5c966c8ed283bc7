"use strict";
// The address holds the query, so that going back, reloading and sharing a link show the same.
const $ = (id) => document.getElementById(id);
const [form, query, folder, after, before] = ["form", "query", "folder", "after", "before"].map($);
const [list, state, like] = ["moments", "status", "like"].map($);
const PAGE = 24;
let asked = null; // the request that is under way
let playing = null;

function said(text, wrong = false) {
  state.textContent = text;
  state.classList.toggle("error", wrong);
}

function address() {
  const given = new URLSearchParams();
  for (const [name, value] of new FormData(form)) if (value.trim()) given.set(name, value.trim());
  for (const one of likes()) given.append("like", one);
  return given;
}

const likes = () => new URLSearchParams(location.search).getAll("like");

function go(given) {
  const text = given.toString();
  if ("?" + text !== location.search) history.pushState(null, "", text ? "?" + text : location.pathname);
  show();
}

async function show() {
  const given = new URLSearchParams(location.search);
  query.value = given.get("q") || "";
  for (const [field, name] of [[after, "after"], [before, "before"]]) field.value = given.get(name) || "";
  choose(given.get("folder") || "");
  $("filters").open = $("filters").open || Boolean(folder.value || after.value || before.value);
  like.hidden = !given.has("like");
  $("like-text").textContent = given.getAll("like").length > 1 ? "like the moments that were chosen" : "like the moment that was chosen";
  document.title = given.get("q") ? given.get("q") + " – videos" : "Search videos";
  if (asked) asked.abort();
  if (!given.get("q") && !given.has("like")) {
    stop();
    list.replaceChildren();
    return about();
  }
  asked = new AbortController();
  const mine = asked;
  said("Searching …");
  given.set("k", given.get("k") || PAGE);
  try {
    const answer = await fetch("api/search?" + given, { signal: mine.signal });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    stop();
    list.replaceChildren(...found.moments.map(card));
    if (list.firstChild) list.firstChild.tabIndex = 0;
    const count = found.moments.length;
    said(count ? `${count} moment${count > 1 ? "s" : ""} in ${found.seconds.toFixed(2)} s` : "Nothing found.");
  } catch (error) {
    if (error.name === "AbortError") return;
    stop();
    list.replaceChildren();
    said(error instanceof TypeError ? "The server does not answer." : error.message, true);
  }
}

function card(moment) {
  const item = $("moment").content.cloneNode(true).firstElementChild;
  const set = (name, text) => { item.querySelector(name).textContent = text; };
  item.moment = moment;
  set(".name", moment.file);
  set(".time", moment.time);
  set(".score", moment.score.toFixed(3));
  set(".date", moment.date);
  const picture = item.querySelector("img");
  picture.src = `poster/${moment.key}?t=${moment.peak}`;
  picture.addEventListener("error", () => picture.remove(), { once: true });
  item.querySelector(".play").setAttribute("aria-label", `Play ${moment.file}, ${moment.time}`);
  item.querySelector(".play").addEventListener("click", () => play(item));
  item.querySelector(".more").addEventListener("click", () => more(item));
  item.addEventListener("focusin", () => {
    for (const other of list.children) other.tabIndex = other === item ? 0 : -1;
  });
  return item;
}

function play(item) {
  const again = playing && playing.item === item;
  stop();
  if (again) return;
  const { key, start, stop: end } = item.moment;
  const video = document.createElement("video");
  Object.assign(video, { src: `video/${key}#t=${start},${end}`, muted: true, controls: true, autoplay: true, playsInline: true });
  const restart = () => { video.currentTime = start; video.play().catch(() => {}); };
  video.addEventListener("timeupdate", () => { if (video.currentTime >= end - 0.02 && !video.paused) restart(); });
  // A browser pauses at the end that the address names, and some a little before it.
  video.addEventListener("pause", () => { if (video.currentTime >= end - 0.3) restart(); });
  video.addEventListener("ended", restart);
  video.addEventListener("error", () => problem(item, "This browser cannot play the file, or it has changed."));
  item.querySelector(".play").hidden = true;
  item.querySelector(".screen").append(video);
  playing = { item, video };
}

function problem(item, text) {
  const note = document.createElement("p");
  note.className = "problem";
  note.textContent = text;
  stop();
  item.querySelector(".problem")?.remove();
  item.querySelector(".screen").append(note);
}

function stop() {
  if (!playing) return;
  playing.video.removeAttribute("src");
  playing.video.load(); // lets go of the connection
  playing.video.remove();
  playing.item.querySelector(".play").hidden = false;
  playing = null;
}

function more(item) {
  const given = new URLSearchParams(location.search);
  given.delete("q");
  given.delete("like");
  given.append("like", `${item.moment.key}@${item.moment.peak}`);
  go(given);
  query.focus();
}

function choose(value) {
  if (value && ![...folder.options].some((option) => option.value === value)) folder.add(new Option(value, value));
  folder.value = value;
}

async function about() {
  try {
    const index = await (await fetch("api/index")).json();
    if (folder.options.length <= 1) for (const { name, value } of index.folders) folder.add(new Option(name, value));
    choose(new URLSearchParams(location.search).get("folder") || "");
    const skipped = index.unreadable ? `, ${index.unreadable.toLocaleString()} files could not be read` : "";
    if (!list.children.length && !asked?.signal.aborted && !query.value && like.hidden)
      said(`${index.clips.toLocaleString()} clips of ${index.videos.toLocaleString()} videos in ${index.name}${skipped}`);
  } catch {
    said("The server does not answer.", true);
  }
}

function columns() {
  const tops = [...list.children].map((item) => item.offsetTop);
  return Math.max(1, tops.filter((top) => top === tops[0]).length);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input, select, textarea");
  const item = event.target.closest?.("#moments > li");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    query.select();
  } else if (event.key === "Escape") {
    if (playing) stop();
    else query.focus();
  } else if (event.key === "ArrowDown" && event.target === query && list.firstChild) {
    event.preventDefault();
    list.firstChild.focus();
  } else if (item && !event.target.matches("video")) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() }[event.key];
    if (step) {
      event.preventDefault();
      const place = [...list.children].indexOf(item) + step;
      (place < 0 ? query : list.children[place] || item).focus();
    } else if ((event.key === "Enter" || event.key === " ") && event.target === item) {
      event.preventDefault();
      play(item);
    } else if (event.key === "m") {
      more(item);
    }
  }
});

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const given = address();
  if (query.value.trim()) given.delete("like");
  go(given);
});
for (const field of [folder, after, before]) field.addEventListener("change", () => go(address()));
$("unlike").addEventListener("click", () => {
  const given = address();
  given.delete("like");
  go(given);
});
window.addEventListener("popstate", show);
about();
show();
