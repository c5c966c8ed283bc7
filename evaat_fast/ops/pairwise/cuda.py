"""The max-margin losses in CUDA C++, of 16-bit features. A verb class beyond 32 bits makes the loss NaN by rule "code"."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from evaat_fast.ops._core.native import dtype_codes, module_of, pointer, run
from evaat_fast.ops.pairwise import gpu


class Sms(gpu.Sms):
    COLUMNS = 8  # so that eight slopes are one store
    # From so many pairs on they are taken in the order of their captions' places in the table, so that neighbours read the same
    # sectors of it: a step of 32,768 pairs drawn at random takes 11.9 ms on an H200, 5.7 with captions in order, one of 4,096
    # 0.249 and 0.209, of 2,048 0.091 and 0.123.
    ORDERED_FROM = 4096

    def __init__(self, video, text, scale, weight, settings, ranks=None):
        places = settings.labels.caption_index
        self.order = None if places is None or len(places) < self.ORDERED_FROM else places.argsort()
        if self.order is not None:
            self.copied = (video.numel() + text.numel()) * video.element_size()
            video, text, weight = (x if x is None else x[self.order] for x in (video, text, weight))
            settings = replace(settings, labels=settings.labels.taken(self.order), own=settings.own[self.order])
        super().__init__(video, text, scale, weight, settings, ranks)

    def finish(self):
        loss, *gradients = super().finish()
        if self.order is None:
            return loss, *gradients
        # One after the other, in the room that the panel leaves.
        self.panel, self.gradients, self.grad_video, self.grad_text = None, [], None, None
        back = lambda x: torch.empty_like(x).index_copy_(0, self.order, x) if len(x) else x  # noqa: E731
        for i in range(len(gradients)):
            gradients[i] = back(gradients[i])
        return back(loss) if self.work.each else loss, *gradients

    def normalise(self, sums=None):
        sums.zero_()
        self.module = module_of("cuda")
        codes = dtype_codes(self.module)
        self.codes = {"dtype": codes[self.dtype], "wide": codes[self.wide]}
        units = self.unit_rows()
        self.features = self._features(self.video, self.text)
        self._run(self.module.pair_prepare, self.features, *map(pointer, units))

    def _features(self, video, text):
        norms, (N, E) = (self.norms, self.inverses), video.shape
        assert norms[1].data_ptr() == norms[0].data_ptr() + 8 * N  # of one tensor
        strides = {"video_stride": video.stride(0), "text_stride": text.stride(0)}
        return self.module.PairFeatures(N=N, E=E, video=video, text=text, norms=norms[0], **self.codes, **strides)

    def _run(self, function, *arguments):
        run(function, self.video.shape, self.device, *arguments)

    def end(self, parts, slopes, over, sums=None, scale=None):
        of_rows, of_columns = map(pointer, sums)
        grads = map(pointer, (self.grad_video, self.grad_text))
        if self.learns:
            self._run(self.module.pair_finish, self.features, of_rows, of_columns, pointer(self.weight), *grads, 1 / over)
        return (parts.sum(dtype=torch.float64) / over).float(), None

    def given(self):
        module, of, penalty, work = self.module, self.settings.labels, self.settings.penalty, self.work
        mode = "each" if work.each else "weighted" if self.weight is not None else "slopes" if self.learns else "loss"
        names = ("video_index", "caption_index", "verb")
        indices = {name: x.long().contiguous() for name in names if (x := getattr(of, name)) is not None}
        dtype = dtype_codes(module)[of.table.dtype] if of.values is None else module.LABEL_CODES
        values = None if of.values is None else of.values.float().contiguous()
        strides = (0, *of.table.stride())[-3:]
        labels = module.PairLabels(table=of.table, dtype=dtype, strides=strides, values=values, **indices)
        V, C = of.table.shape[-2:]
        self.step = module.SmsGpu(
            pairs=self._features(_whole(self.video), _whole(self.text)),
            labels=labels,
            V=V,
            C=C,
            own=self.settings.own.to(self.wide).contiguous(),
            own_of_all=self.settings.own.stride(0) == 0,
            weight=self.weight,
            videos=self.empty(self.N, module.ANCHOR_BYTES, dtype=torch.uint8),
            captions=self.empty(self.N, module.ANCHOR_BYTES, dtype=torch.uint8),
            penalty=module.Penalty(**vars(penalty) | {"rule": module.SMS_RULES[penalty.rule]}),
            mode=module.SMS_MODES[mode],
            row_sum=self.sums[0],
            col_sum=self.sums[1],
        )
        self._run(module.sms_anchors, self.step)
        return module.TILE

    def read(self, slopes, row_loss, col_loss, first, last):
        stride = 0 if slopes is None else slopes.stride(0)
        self._run(self.module.sms_panel, self.step, pointer(slopes), stride, pointer(row_loss), pointer(col_loss), first, last)


def _whole(x: Tensor) -> Tensor:
    """x, or where its rows do not begin at multiples of 16 bytes or end in the midst of one, a copy with zeros behind them."""
    if x.stride(0) % 8 == 0 and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return pad(x, (0, -x.shape[1] % 8)).contiguous()
