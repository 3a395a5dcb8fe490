"""The parts of torch that peer.py uses, without any arithmetic. For gpu/rehearse.sh."""

from contextlib import nullcontext

__version__ = "0.0.stand.in"
bfloat16 = "bfloat16"


class Tensor:
    def __init__(self, shape=()):
        self.shape = shape

    def __getitem__(self, _):
        return self

    def __add__(self, _):
        return self

    def argmax(self, _):
        return self


class cuda:
    synchronize = staticmethod(lambda: None)


def randint(low, high, shape, device):
    return Tensor(shape)


def arange(count, device):
    return Tensor((count,))


def tensor(values, device):
    return Tensor((len(values),))


def compile(function, mode, fullgraph):
    return function


def no_grad():
    return nullcontext()
