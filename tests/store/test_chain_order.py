"""A tier gives up the end of the chain that was used least recently, as a plain model says."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st

from spectral_paged.store.chain_order import ChainOrder

KEYS = [bytes([i]) for i in range(9)]
PARENT = {key: KEYS[(i - 1) // 2] if i else None for i, key in enumerate(KEYS)}  # a tree


class PlainOrder:
    """Every question is answered by looking at everything."""

    def __init__(self):
        self.used = {}
        self.clock = 0

    def use(self, keys):
        self.clock += 1
        self.used |= {key: self.clock for key in keys if key in self.used}

    def oldest(self, may_go):
        followed = {PARENT[key] for key in self.used}
        ends = [k for k in self.used if k not in followed and may_go(k)]
        return min(ends, key=lambda k: (self.used[k], k), default=None)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.sampled_from(KEYS)),
            st.tuples(st.just("use"), st.lists(st.sampled_from(KEYS))),
            st.tuples(st.just("remove"), st.sampled_from(KEYS)),
            st.tuples(st.just("evict"), st.frozensets(st.sampled_from(KEYS))),
        ),
        max_size=60,
    )
)
def test_the_oldest_end_goes_first(operations):
    order, plain = ChainOrder(), PlainOrder()
    for what, arg in operations:
        if what == "add" and arg not in plain.used:
            order.add(arg, PARENT[arg])
            plain.used[arg] = 0
            plain.use([arg])
        elif what == "use":
            order.use(arg)
            plain.use(arg)
        elif what == "remove" and arg in plain.used:
            order.remove(arg)
            del plain.used[arg]
        elif what == "evict":
            others = set(KEYS) - arg
            found = order.oldest(others.__contains__)
            assert found == plain.oldest(others.__contains__)
            if found is not None:
                order.remove(found)
                del plain.used[found]
        assert set(order) == set(plain.used)


def test_a_chain_is_given_up_from_its_end():
    order = ChainOrder()
    for i, key in enumerate(KEYS):
        order.add(key, KEYS[i - 1] if i else None)
    gone = []
    while (key := order.oldest(lambda key: True)) is not None:
        order.remove(key)
        gone.append(key)
    assert gone == KEYS[::-1]


def test_many_uses_leave_no_trace():
    order = ChainOrder()
    for key in KEYS:
        order.add(key, None)
    for _ in range(5000):
        order.use(KEYS[:2])
    assert len(order._ends) < 200
    assert order.oldest(lambda key: True) == KEYS[2]
