"""The books of the cache: holders, names, and which page is given up first."""

import random

import pytest

from hpcinfer.engine.block_manager import Pages, digests, pages_for
from hpcinfer.model.cache import PAGE

pytestmark = pytest.mark.single


def test_pages_for():
    assert [pages_for(n) for n in (0, 1, PAGE, PAGE + 1, 3 * PAGE)] == [0, 1, 1, 2, 3]


def test_taken_pages_differ_and_come_back():
    pages = Pages(5)
    taken = pages.take([0] * 3) + pages.take([0] * 2)
    assert sorted(taken) == list(range(5))
    assert (pages.free(0), pages.held) == (0, 5)
    with pytest.raises(RuntimeError, match="pages: got too few free pages for 1 more"):
        pages.take([0])
    pages.release(taken)
    assert (pages.free(0), pages.held) == (5, 0)


def test_every_rank_has_its_own_pool():
    """A pool that is empty gives nothing, whatever the others have."""
    pages = Pages(2, ranks=3)
    assert pages.total == 6
    taken = pages.take([1, 2, 1])
    assert [pages.owner(page) for page in taken] == [1, 2, 1]
    assert [pages.free(rank) for rank in range(3)] == [2, 0, 1]
    assert pages.emptiest == 0
    assert pages.fit([0, 0, 2]) and not pages.fit([1]) and not pages.fit([2, 2])
    with pytest.raises(RuntimeError, match="got too few free pages for 2 more"):
        pages.take([0, 1])
    assert pages.held == 3
    pages.release(taken)
    assert [pages.free(rank) for rank in range(3)] == [2, 2, 2]


def test_a_page_that_is_found_takes_room_only_if_nobody_holds_it():
    pages = Pages(2)
    a, b = pages.take([0, 0])
    pages.name(a, b"a")
    pages.release([a])
    assert not pages.fit([0], [a])
    assert pages.fit([], [a, b])
    pages.hold([a])
    assert not pages.fit([0]) and pages.fit([], [a, b])


def test_a_released_page_keeps_its_text_until_its_room_is_needed():
    pages = Pages(3)
    a, b = pages.take([0, 0])
    pages.name(a, b"a")
    pages.name(b, b"ab")
    pages.release([a, b])
    assert pages.free(0) == 3
    assert pages.find([b"a", b"ab", b"abc"]) == [a, b]

    # The blank page goes first, then the end of the text, then its beginning
    assert pages.take([0]) not in ([a], [b])
    assert pages.take([0]) == [b]
    assert pages.find([b"a", b"ab"]) == [a]
    assert pages.take([0]) == [a]
    assert pages.find([b"a"]) == []


def test_the_text_released_longest_ago_goes_first():
    pages = Pages(3)
    for text in (b"a", b"b", b"c"):
        (page,) = pages.take([0])
        pages.name(page, text)
        pages.release([page])
    again = pages.find([b"a"])
    pages.hold(again)
    pages.release(again)
    assert pages.take([0])
    assert [bool(pages.find([text])) for text in (b"a", b"b", b"c")] == [True, False, True]


def test_a_page_with_two_holders_is_held_until_both_let_go():
    pages = Pages(2)
    (page,) = pages.take([0])
    pages.name(page, b"a")
    pages.hold(pages.find([b"a"]))
    pages.release([page])
    assert pages.held == 1
    pages.release([page])
    assert pages.held == 0


def test_find_ends_at_the_first_gap():
    pages = Pages(2)
    a, b = pages.take([0, 0])
    pages.name(a, b"a")
    pages.name(b, b"abc")
    assert pages.find([b"a", b"ab", b"abc"]) == [a]
    assert pages.find([]) == []


def test_find_ends_where_pages_were_not_dealt_in_turn():
    """The first page was given up and computed again, from another rank on."""
    pages = Pages(1, ranks=3)
    for page, text in zip(pages.take([2, 1]), (b"a", b"ab"), strict=True):
        pages.name(page, text)
    assert [pages.owner(page) for page in pages.find([b"a", b"ab"])] == [2]


def test_a_text_keeps_its_first_page_and_a_page_its_first_text():
    pages = Pages(2)
    a, b = pages.take([0, 0])
    pages.name(a, b"a")
    pages.name(b, b"a")
    pages.name(a, b"other")
    assert pages.find([b"a"]) == [a]
    assert pages.find([b"other"]) == []
    pages.release([a, b])
    assert pages.free(0) == 2


def test_digests_tell_whole_beginnings():
    tokens = list(range(3 * PAGE + 5))
    three = digests(tokens)
    assert len(three) == 3 == len(set(three))
    assert digests(tokens[: 2 * PAGE]) == digests(tokens[: 3 * PAGE - 1]) == three[:2]
    assert digests(tokens, known=three[:1]) == digests(tokens, known=three) == three
    assert digests(tokens[: PAGE - 1]) == []

    # The same page after another beginning, or with another seed, is another text
    other = digests([7, *tokens[1:]])
    assert not set(other) & set(three)
    assert not set(digests(tokens, seed=b"long")) & set(three)


@pytest.mark.parametrize("ranks", [1, 3])
def test_books_are_right_after_any_history(ranks):
    """Random holders of random texts: no page is taken from a holder, every name is true."""
    rng, pages = random.Random(0), Pages(12 // ranks, ranks)
    content, holders = {}, []
    for _ in range(10_000):
        if holders and rng.random() < 0.5:
            pages.release(holders.pop(rng.randrange(len(holders))))
        else:
            text = [bytes([rng.randrange(3)]) * (i + 1) for i in range(rng.randint(1, 5))]
            found = pages.find(text)
            assert [content[page] for page in found] == text[: len(found)]
            first = pages.owner(found[0]) if found else rng.randrange(ranks)
            owners = [(first + i) % ranks for i in range(len(found), len(text))]
            if not pages.fit(owners, found):
                continue
            pages.hold(found)
            fresh = pages.take(owners)
            assert [pages.owner(page) for page in fresh] == owners
            assert not set(fresh) & {page for held in holders for page in held}
            for page, name in zip(fresh, text[len(found) :], strict=True):
                content[page] = name
                pages.name(page, name)
            holders.append(found + fresh)
        held = {page for pages_held in holders for page in pages_held}
        assert pages.held == len(held)
        for rank in range(ranks):
            own = sum(pages.owner(page) == rank for page in held)
            assert pages.free(rank) == pages.n - own
    for held in holders:
        pages.release(held)
    assert pages.held == 0
