"Nothing here reaches the network."

import os
from collections.abc import Callable

import pytest

from qalign.core import Settings

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def watched() -> Callable[[Settings], tuple[Settings, set[str]]]:
    "Returns a function that gives settings which note the keys that are read, and those keys."

    def watch(settings: Settings) -> tuple[Settings, set[str]]:
        read: set[str] = set()

        class Watched(Settings):
            def __getattribute__(self, name):
                if not name.startswith("_"):
                    read.add(name)
                return super().__getattribute__(name)

            def to_dict(self):  # for the record of the run: every key
                known = set(read)
                found = super().to_dict()
                read.intersection_update(known)
                return found

            def replace(self, **overrides):
                return Watched(**super().replace(**overrides).to_dict())

        return Watched(**settings.to_dict()), read

    return watch
