"""InfoNCE of image and text features, whose logits are never all there, for the modules that are named after CLIP's."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from evaat_fast import ops
from evaat_fast.losses._gather import Gathers, alike

_ACCURACY_BYTES = 64 << 20  # of the logits that the accuracy is read from, a block of rows at a time


@dataclass(frozen=True)
class Batch:
    """Rows [n, E] of this rank or of all, and what they are compared with: images, texts [N, E], of which row i's own is
    labels[i], or i where labels is None and the rows are all."""

    image_rows: Tensor
    text_rows: Tensor
    images: Tensor
    texts: Tensor
    labels: Tensor | None = None

    @classmethod
    def whole(cls, images: Tensor, texts: Tensor) -> "Batch":
        """Of all ranks' features, `alike`."""
        return cls(images, texts, images, texts)

    def loss(self, logit_scale: Tensor | float) -> Tensor:
        if self.labels is None:
            return ops.clip_loss(self.images, self.texts, self._on_device(logit_scale))
        # `ops.clip_loss` takes no rows of a larger batch, so these [n, N] logits are there.
        pairs = (self.image_rows, self.texts), (self.text_rows, self.images)
        dtype = torch.promote_types(self.images.dtype, torch.float32)
        one, other = (cross_entropy((logit_scale * a @ b.T).to(dtype), self.labels) for a, b in pairs)
        return (one + other) / 2

    def hits(self, logit_scale: Tensor | float) -> Tensor:
        """bool [n]: whether the largest logit of an image is its own text's."""
        n, found = len(self.image_rows), []
        labels = torch.arange(n, device=self.images.device) if self.labels is None else self.labels
        rows = max(1, _ACCURACY_BYTES // max(1, len(self.texts) * self.images.element_size()))
        for begin in range(0, n, rows):
            with torch.no_grad():
                guess = (logit_scale * self.image_rows[begin : begin + rows] @ self.texts.T).argmax(1)
            found.append(guess == labels[begin : begin + rows])
        return torch.cat(found) if found else labels.bool()

    def _on_device(self, logit_scale):
        """Torch's products take a number that lies on the CPU."""
        if isinstance(logit_scale, Tensor) and logit_scale.ndim == 0:
            return logit_scale.to(self.images.device)
        return logit_scale


def per_cent(hits: Tensor) -> Tensor:
    return 100 * hits.sum() / max(1, len(hits))


class Contrastive(Gathers):
    """The constructor that AVION's and open_clip's ClipLoss share, and their labels."""

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__(local_loss, gather_with_grad, rank, world_size, use_horovod)
        self.cache_labels = cache_labels
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """int64 [num_logits]: which of all texts belongs to each image, as in a local loss of rank `rank`."""
        if self.prev_num_logits == num_logits and device in self.labels:
            return self.labels[device]
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        labels = torch.arange(first, first + num_logits, device=device)
        if self.cache_labels:
            self.labels[device], self.prev_num_logits = labels, num_logits
        return labels

    def batch(self, images: Tensor, texts: Tensor) -> Batch:
        """Of this rank's features."""
        images, texts = alike(images, texts)
        if self.world_size == 1:
            return Batch.whole(images, texts)
        # Without a gradient of what was gathered, a local loss has that of its own rows as rows alone.
        own = not self.local_loss
        all_images, all_texts = self.gather(images, own), self.gather(texts, own)
        if self.local_loss:
            return Batch(images, texts, all_images, all_texts, self.get_ground_truth(images.device, len(images)))
        return Batch.whole(all_images, all_texts)
