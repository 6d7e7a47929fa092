"""What the GPUs of this machine say of themselves through NVML, NVIDIA's driver library: load, temperature, power."""

import threading

import pynvml

SECONDS = 5  # between readings; the driver takes milliseconds to answer, so a thread asks, and not the training loop


class GpuReadings:
    """Reads all GPUs of this machine, in a thread. Where there is no NVIDIA driver, there is nothing to read."""

    def __init__(self):
        self.latest = {}
        self.stop = threading.Event()
        try:
            pynvml.nvmlInit()
            self.handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError:
            self.handles = []
        if self.handles:
            self._read()
            threading.Thread(target=self._keep_reading, name="gpu readings", daemon=True).start()

    def _keep_reading(self):
        while not self.stop.wait(SECONDS):
            self._read()

    def _read(self):
        try:
            self.latest = {
                "gpu_utilization_percent": min(pynvml.nvmlDeviceGetUtilizationRates(h).gpu for h in self.handles),
                "gpu_temperature_c": max(
                    pynvml.nvmlDeviceGetTemperature(h, pynvml.NVML_TEMPERATURE_GPU) for h in self.handles
                ),
                "gpu_power_w": round(sum(pynvml.nvmlDeviceGetPowerUsage(h) for h in self.handles) / 1000),
            }
        except pynvml.NVMLError:  # a reading that this GPU does not give, or a GPU that is lost
            self.latest = {}

    def close(self):
        self.stop.set()
