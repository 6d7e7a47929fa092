"""torchrun with the exit codes and signals of our runs: python -m launch.torchrun takes what torchrun takes.

torchrun itself ends with 1 whatever its processes ended with, and kills them 30 seconds after a SIGTERM. Here SIGTERM
and SIGUSR1 are passed on and waited for, as long as saving takes, and the exit code is that of the process that failed
first (train/exit_codes.py), 128 + its signal if it was killed.
"""

import signal
import sys

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import main as torchrun

from train.exit_codes import FAILED, INTERRUPTED

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)


def pass_on(number, frame):
    for child in psutil.Process().children():
        child.send_signal(number)


def main(argv=None):
    for number in PASSED_ON:
        signal.signal(number, pass_on)
    try:
        torchrun(["--signals-to-handle=SIGINT,SIGHUP", *(sys.argv[1:] if argv is None else argv)])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as stopped:
        return INTERRUPTED if stopped.sigval == signal.SIGINT else FAILED
    except RendezvousError as error:
        print(f"error: the nodes did not all meet: {error or type(error).__name__}", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
