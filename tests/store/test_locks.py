"""A key is locked by one owner at a time, and the lock ends with its process."""

from calls import key

from tapir_local.store.locks import Claims


def test_a_key_is_locked_by_one_owner_until_it_is_closed(tmp_path):
    one, two = Claims(tmp_path / "asking"), Claims(tmp_path / "asking")
    assert one.take(key(1))
    assert not one.take(key(1))
    assert not two.take(key(1))
    assert two.take(key(2))
    one.drop(key(1))
    assert two.take(key(1))
    two.close()
    assert one.take(key(1))
    one.close()
