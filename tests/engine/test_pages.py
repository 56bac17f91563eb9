"""The block table of the cache: holders, names, and which page is given up first."""

import random

import pytest

from hpcinfer.engine.block_manager import BlockManager, block_hashes, pages_for
from hpcinfer.model.cache import PAGE

pytestmark = pytest.mark.single


def test_pages_for():
    assert [pages_for(n) for n in (0, 1, PAGE, PAGE + 1, 3 * PAGE)] == [0, 1, 1, 2, 3]


def test_taken_pages_differ_and_come_back():
    pages = BlockManager(5)
    taken = pages.allocate([0] * 3) + pages.allocate([0] * 2)
    assert sorted(taken) == list(range(5))
    assert (pages.n_free(0), pages.held) == (0, 5)
    with pytest.raises(RuntimeError, match="pages: got too few free pages for 1 more"):
        pages.allocate([0])
    pages.free(taken)
    assert (pages.n_free(0), pages.held) == (5, 0)


def test_every_rank_has_its_own_pool():
    """A pool that is empty gives nothing, whatever the others have."""
    pages = BlockManager(2, ranks=3)
    assert pages.total == 6
    taken = pages.allocate([1, 2, 1])
    assert [pages.owner(page) for page in taken] == [1, 2, 1]
    assert [pages.n_free(rank) for rank in range(3)] == [2, 0, 1]
    assert pages.emptiest == 0
    assert (
        pages.can_allocate([0, 0, 2])
        and not pages.can_allocate([1])
        and not pages.can_allocate([2, 2])
    )
    with pytest.raises(RuntimeError, match="got too few free pages for 2 more"):
        pages.allocate([0, 1])
    assert pages.held == 3
    pages.free(taken)
    assert [pages.n_free(rank) for rank in range(3)] == [2, 2, 2]


def test_a_page_that_is_found_takes_room_only_if_nobody_holds_it():
    pages = BlockManager(2)
    a, b = pages.allocate([0, 0])
    pages.register(a, b"a")
    pages.free([a])
    assert not pages.can_allocate([0], [a])
    assert pages.can_allocate([], [a, b])
    pages.acquire([a])
    assert not pages.can_allocate([0]) and pages.can_allocate([], [a, b])


def test_a_released_page_keeps_its_text_until_its_room_is_needed():
    pages = BlockManager(3)
    a, b = pages.allocate([0, 0])
    pages.register(a, b"a")
    pages.register(b, b"ab")
    pages.free([a, b])
    assert pages.n_free(0) == 3
    assert pages.match_prefix([b"a", b"ab", b"abc"]) == [a, b]

    # The blank page goes first, then the end of the text, then its beginning
    assert pages.allocate([0]) not in ([a], [b])
    assert pages.allocate([0]) == [b]
    assert pages.match_prefix([b"a", b"ab"]) == [a]
    assert pages.allocate([0]) == [a]
    assert pages.match_prefix([b"a"]) == []


def test_the_text_released_longest_ago_goes_first():
    pages = BlockManager(3)
    for text in (b"a", b"b", b"c"):
        (page,) = pages.allocate([0])
        pages.register(page, text)
        pages.free([page])
    again = pages.match_prefix([b"a"])
    pages.acquire(again)
    pages.free(again)
    assert pages.allocate([0])
    assert [bool(pages.match_prefix([text])) for text in (b"a", b"b", b"c")] == [True, False, True]


def test_a_page_with_two_holders_is_held_until_both_let_go():
    pages = BlockManager(2)
    (page,) = pages.allocate([0])
    pages.register(page, b"a")
    pages.acquire(pages.match_prefix([b"a"]))
    pages.free([page])
    assert pages.held == 1
    pages.free([page])
    assert pages.held == 0


def test_find_ends_at_the_first_gap():
    pages = BlockManager(2)
    a, b = pages.allocate([0, 0])
    pages.register(a, b"a")
    pages.register(b, b"abc")
    assert pages.match_prefix([b"a", b"ab", b"abc"]) == [a]
    assert pages.match_prefix([]) == []


def test_find_ends_where_pages_were_not_dealt_in_turn():
    """The first page was given up and computed again, from another rank on."""
    pages = BlockManager(1, ranks=3)
    for page, text in zip(pages.allocate([2, 1]), (b"a", b"ab"), strict=True):
        pages.register(page, text)
    assert [pages.owner(page) for page in pages.match_prefix([b"a", b"ab"])] == [2]


def test_a_text_keeps_its_first_page_and_a_page_its_first_text():
    pages = BlockManager(2)
    a, b = pages.allocate([0, 0])
    pages.register(a, b"a")
    pages.register(b, b"a")
    pages.register(a, b"other")
    assert pages.match_prefix([b"a"]) == [a]
    assert pages.match_prefix([b"other"]) == []
    pages.free([a, b])
    assert pages.n_free(0) == 2


def test_digests_tell_whole_beginnings():
    tokens = list(range(3 * PAGE + 5))
    three = block_hashes(tokens)
    assert len(three) == 3 == len(set(three))
    assert block_hashes(tokens[: 2 * PAGE]) == block_hashes(tokens[: 3 * PAGE - 1]) == three[:2]
    assert block_hashes(tokens, known=three[:1]) == block_hashes(tokens, known=three) == three
    assert block_hashes(tokens[: PAGE - 1]) == []

    # The same page after another beginning, or with another seed, is another text
    other = block_hashes([7, *tokens[1:]])
    assert not set(other) & set(three)
    assert not set(block_hashes(tokens, seed=b"long")) & set(three)


@pytest.mark.parametrize("ranks", [1, 3])
def test_books_are_right_after_any_history(ranks):
    """Random holders of random texts: no page is taken from a holder, every name is true."""
    rng, pages = random.Random(0), BlockManager(12 // ranks, ranks)
    content, holders = {}, []
    for _ in range(10_000):
        if holders and rng.random() < 0.5:
            pages.free(holders.pop(rng.randrange(len(holders))))
        else:
            text = [bytes([rng.randrange(3)]) * (i + 1) for i in range(rng.randint(1, 5))]
            found = pages.match_prefix(text)
            assert [content[page] for page in found] == text[: len(found)]
            first = pages.owner(found[0]) if found else rng.randrange(ranks)
            owners = [(first + i) % ranks for i in range(len(found), len(text))]
            if not pages.can_allocate(owners, found):
                continue
            pages.acquire(found)
            fresh = pages.allocate(owners)
            assert [pages.owner(page) for page in fresh] == owners
            assert not set(fresh) & {page for held in holders for page in held}
            for page, name in zip(fresh, text[len(found) :], strict=True):
                content[page] = name
                pages.register(page, name)
            holders.append(found + fresh)
        held = {page for pages_held in holders for page in pages_held}
        assert pages.held == len(held)
        for rank in range(ranks):
            own = sum(pages.owner(page) == rank for page in held)
            assert pages.n_free(rank) == pages.n - own
    for held in holders:
        pages.free(held)
    assert pages.held == 0
