"""A bucket on this machine: an emulator of Google Cloud Storage, and the environment that sends its clients there.

python -m tests.bucket_server 9023
"""

from __future__ import annotations

import contextlib
import sys
import threading

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

BUCKET = "runs"


def environment(port: int) -> dict[str, str]:
    """Where gcsfs, google-cloud-storage and TensorStore look for buckets, and that they need no credentials."""
    address = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_CLOUD_PROJECT": "none",
        "NO_GCE_CHECK": "true",
        "FSSPEC_GCS": '{"token": "anon"}',
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # It asks for the kind of bucket by gRPC.
    }


def _move(request, response, storage):
    """The emulator lacks it, and gcsfs tries it for half a minute before it copies and deletes."""
    request.params["dest_bucket_name"] = request.params["bucket_name"]
    objects.copy(request, response, storage)
    objects.delete(request, response, storage)


def _download(request, response, storage, without_generation=objects.download):
    """TensorStore needs the generation of a file that it read to write over it: where a save was cut off."""
    with contextlib.suppress(NotFound):
        found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = found["generation"]
    without_generation(request, response, storage)


def main() -> None:
    move = r"^/storage/v1/b/(?P<bucket_name>[^/]+)/o/(?P<object_id>[^/]+)/moveTo/o/(?P<dest_object_id>[^/]+)$"
    objects.download = _download
    server.HANDLERS = ((move, {"POST": _move}), *server.HANDLERS)
    running = server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=BUCKET)
    running.start()
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
