// Included by sms_cpu.cpp once for each instruction set, as a target attribute cannot be a template argument. TARGET: that
// attribute; V: the vectors.

// `side` of the pairs in `keep`.
template <int rule>
TARGET EVAAT_INLINE V::F side(V::F self, V::F c, V::F own, V::F s, V::F margin, V::F relaxation, V::F eps, V::Mask keep, V::F& loss) {
  const V::F d = self - c, gap = own - s;
  V::F m = margin * d - gap;
  const V::Mask equal = V::compare<_CMP_LT_OQ>(V::abs(d), eps);
  const V::Mask less = V::compare<rule == kCode ? _CMP_NGT_UQ : _CMP_NGE_UQ>(d, eps);
  if (rule == kCharades) keep = V::but(keep, V::compare<_CMP_LE_OQ>(d, -eps));
  if (rule != kCode) m = V::select(equal, -gap, m);
  const V::F penalty = V::select(equal, V::abs(m) - relaxation, V::flip_where(less, m));
  const V::Mask active = V::both(keep, V::compare<_CMP_NLE_UQ>(penalty, V::fill(0.0f)));  // NaN too
  loss = loss + V::where(active, penalty);
  return V::where(active, V::sign(m));
}

template <class S, int mode, int rule>
TARGET void block(Block<float, S>& b) {
  const V::F margin = V::fill(b.margin), relaxation = V::fill(b.relaxation), eps = V::fill(b.eps), zero = V::fill(0.0f);
  V::F loss[kRows], sum[kRows];
  for (int r = 0; r < kRows; ++r) loss[r] = sum[r] = zero;
  int64_t i = b.begin;
  for (; V::masked_tail ? i < b.end : i + V::W <= b.end; i += V::W) {
    const V::Mask inside = V::first(b.end - i);
    const V::F self = V::load(b.self + i, inside), diagonal = V::load(b.diagonal + i, inside);
    V::F column = zero, column_loss = zero;
    for (int r = 0; r < kRows; ++r) {
      const int64_t own = b.own[r] - i;
      const V::Mask keep = own >= 0 && own < V::W ? V::but(inside, V::only(own)) : inside;
      V::F s = V::load(b.s[r] + i, inside);
      if (b.col_scale) s = s * V::fill(b.row_scale[r]) * V::load(b.col_scale + i, inside);
      const V::F c = V::load(b.label[r] + (i - b.begin), inside);
      V::F& caption_loss = mode == kEach ? column_loss : loss[r];
      const V::F g1 = side<rule>(self, c, diagonal, s, margin, relaxation, eps, keep, caption_loss);
      const V::F g2 = side<rule>(V::fill(b.row_self[r]), c, V::fill(b.row_diagonal[r]), s, margin, relaxation, eps, keep, loss[r]);
      column = column + g1;
      sum[r] = sum[r] + g2;
      if (mode == kSlopes) V::store(b.s[r] + i, inside, g1 + g2);
      if constexpr (mode == kWeighted)
        V::store(b.s[r] + i, inside, g1 * V::load(b.weight + i, inside) + g2 * V::fill(b.weight[b.own[r]]));
    }
    if (mode == kEach) V::add(b.col_loss + i, inside, column_loss);
    V::add(b.col_sum + i, inside, column);
  }
  for (int r = 0; r < kRows; ++r) {
    b.loss[r] += double(V::sum(loss[r]));
    b.row_sum[r] += int32_t(V::sum(sum[r]));
  }
  if (i < b.end) block_plain<float, S, mode, rule>(b, i);
}

#undef TARGET
