"""What a run's GPUs on this machine say of themselves through NVIDIA's driver: load, temperature, power."""

import threading

import torch
from pynvml import NVMLError

SECONDS = 5  # between readings; the driver takes milliseconds to answer, so a thread asks, and not the training loop


class GpuReadings:
    """Reads the first n_gpus that CUDA shows to this process, in a thread. Without GPUs there is nothing to read."""

    def __init__(self, n_gpus):
        self.latest = {}
        self.stop = threading.Event()
        self.gpus = range(min(n_gpus, torch.cuda.device_count()))
        if self.gpus:
            self._read()
            threading.Thread(target=self._keep_reading, name="gpu readings", daemon=True).start()

    def _keep_reading(self):
        while not self.stop.wait(SECONDS):
            self._read()

    def _read(self):
        try:
            self.latest = {
                "gpu_utilization_percent": min(map(torch.cuda.utilization, self.gpus)),
                "gpu_temperature_c": max(map(torch.cuda.temperature, self.gpus)),
                "gpu_power_w": round(sum(map(torch.cuda.power_draw, self.gpus)) / 1000),
            }
        except (NVMLError, RuntimeError):  # a reading that this GPU does not give, or a GPU that is lost
            self.latest = {}

    def close(self):
        self.stop.set()
