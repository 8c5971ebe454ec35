"""Triton's interpreter, without what it does again at every operation or call of a function.

What kernels compute stays the interpreter's own. Most of its time goes into types that it makes
anew for each operation, and these depend on few shapes and element types.
"""

from __future__ import annotations

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def patch_the_language_once() -> None:
    """A kernel patches the language for its run, and each function that it calls does so again.

    That finds nothing left to patch, and looking takes a third of the time of a kernel.
    """
    patch = interpreter._patch_lang

    def patch_unless_patched(fn):
        seen = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        if seen and not any(tl.core.is_builtin(language.load) for language in seen):
            return interpreter._LangPatchScope()
        return patch(fn)

    interpreter._patch_lang = patch_unless_patched


def make_shapes_once() -> None:
    """A shape is checked, counted and spelled for the first type or tensor that has it."""
    of_type, of_tensor = tl.block_type.__init__, tl.tensor.__init__
    types, tensors = {}, {}

    def make_type(self, element_ty, shape):
        key = tuple([s.value if isinstance(s, tl.constexpr) else s for s in shape])
        if key not in types:
            of_type(self, element_ty, shape)
            types[key] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, spelled = types[key]
        self.name = f"<{spelled}, {element_ty}>"

    def make_tensor(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in tensors:
            of_tensor(self, handle, type)
            tensors[key] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[key]

    tl.block_type.__init__, tl.tensor.__init__ = make_type, make_tensor

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_unless_alike(self, lhs, rhs):
        alike = lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_unless_alike


def look_up_numpy_types_once() -> None:
    """NumPy's type for an element type is looked up in a table that each look-up makes anew."""
    look_up, known = interpreter._get_np_dtype, {}

    def find(dtype):
        element = dtype.scalar
        if element.name not in known:
            known[element.name] = look_up(element)
        return known[element.name]

    interpreter._get_np_dtype = find
