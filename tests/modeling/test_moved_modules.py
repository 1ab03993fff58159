"""Names of modules that scripts still import, from before the rooms of the package."""

import sys
from importlib import import_module

import pytest

import modeling_mistral_large  # noqa: F401  # finds them
from modeling_mistral_large.moved_modules import MOVED
from tests.support.errors import whole


@pytest.mark.parametrize("old", MOVED)
def test_an_old_module_has_the_names_of_the_new_one_and_says_where_it_is(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=whole(f"{old} is now {MOVED[old]}")):
        moved = import_module(old)
    new = import_module(MOVED[old])
    public = [name for name in getattr(new, "__all__", vars(new)) if not name.startswith("_")]
    assert public
    assert all(getattr(moved, name) is getattr(new, name) for name in public)
    with pytest.raises(AttributeError):
        moved.absent  # noqa: B018
