"""A manager that another thread closes while this one looks at the file is closed for both."""

import pytest

from modelquota import ManagerClosedError, ResourceQuotaManager
from modelquota._core.state import file as statefile


@pytest.mark.parametrize("fault", [None, "it is gone"])
@pytest.mark.parametrize("verb", ["check_quota", "reserve", "acquire"])
def test_a_close_during_a_look_at_the_file(tmp_path, monkeypatch, caplog, verb, fault):
    manager = ResourceQuotaManager(path=tmp_path / "quota.state")
    manager.set_quota("m")

    def closed_meanwhile(*_):
        manager.close()
        return fault

    monkeypatch.setattr(statefile, "loss_of", closed_meanwhile)  # what the other thread does in the meantime
    for _ in range(3):  # the next verbs do not take the look for done
        with pytest.raises(ManagerClosedError):
            getattr(manager, verb)("m", 1)
    assert not caplog.records
