"""Remote places for tests: a store with the shortest list of abilities."""

import os

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Store(LocalFileSystem):
    """A store on the disk that knows neither links nor renames, and refuses what is below `refused`."""

    protocol = "store"
    refused = "/nowhere"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(os.fspath(path).removeprefix("store://"))

    def unstrip_protocol(self, name):
        return f"store://{self._strip_protocol(name)}"

    def _refuse(self, *_, **__):
        raise NotImplementedError("this store can neither link nor rename")

    link = symlink = mv = mv_file = _refuse

    def open(self, path, mode="rb", **options):
        if mode != "rb" and self._strip_protocol(path).startswith(self.refused):
            raise PermissionError("403, billing account disabled\nrequest id 17")
        return super().open(path, mode, **options)


fsspec.register_implementation("store", Store, clobber=True)
