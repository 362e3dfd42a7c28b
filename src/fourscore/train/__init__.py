"""Training: rows and a 4-bit model with an adapter in, the adapter with the lowest validation loss out."""

from fourscore.train.loop import Probe, TrainResult, loss_on_rows, probe, train

__all__ = ["Probe", "TrainResult", "loss_on_rows", "probe", "train"]
