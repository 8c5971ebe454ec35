"""Stand-ins for the GPU kernels of the package, which see every launch and run none of them."""

from __future__ import annotations

import re
from collections import defaultdict
from importlib import import_module
from pkgutil import walk_packages

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from spectral_paged import kernels

HOPPER = GPUTarget("cuda", 90, 32)


def every_kernel():
    """The package's kernels: `(module, name)` of each, in whose module every launch looks it up."""
    for found in walk_packages(kernels.__path__, f"{kernels.__name__}."):
        if re.search(r"\.(triton|gluon)\b", found.name):
            module = import_module(found.name)
            yield from ((module, n) for n in vars(module) if re.fullmatch(r"_\w+_kernel", n))


def short_name(module, name):
    """`decode.gluon.attend._attend_kernel`."""
    return f"{module.__name__.partition('kernels.')[2]}.{name}"


class Recorded:
    """A stand-in for one kernel, which adds what Triton would build for each launch to `builds`."""

    def __init__(self, kernel, name, builds):
        if not isinstance(kernel, JITFunction):  # the interpreter's, with the arguments of `jit`
            kernel = JITFunction(kernel.fn, **kernel.kwargs)
        self.name, self.builds, self.params = name, builds, kernel.params
        backend = make_backend(HOPPER)
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.warmup(*args, grid=grid, **kwargs)

    def warmup(self, *args, grid, **kwargs):
        values, kinds, options = self.bind(*args, **kwargs)
        fixed, free = dict(options), {}
        for param, kind in zip(self.params, kinds, strict=True):
            if kind[0] == "constexpr":
                fixed[param.name] = values[param.name]
            else:
                free[param.name] = kind
        self.builds[self.name, str(sorted(fixed.items()))].append(free)


def record_launches(monkeypatch):
    """Replace every kernel; returns the launches, `{(kernel, constants): [{argument: kind}]}`.

    Triton builds a kernel once for each set of constants and kinds of the other arguments: the type
    of each, and whether it is 1 or a multiple of 16.
    """
    builds = defaultdict(list)
    for module, name in list(every_kernel()):
        stand_in = Recorded(getattr(module, name), short_name(module, name), builds)
        monkeypatch.setattr(module, name, stand_in)
    return builds


def varying(builds):
    """The arguments for which a kernel is built again: `{(kernel, argument): kinds}`."""
    found = {}
    for (kernel, _), launches in builds.items():
        for argument in launches[0]:
            kinds = {launch[argument] for launch in launches}
            if len(kinds) > 1:
                found[kernel, argument] = kinds
    return found
