"""An in-memory emulator of Google's object store, with the bucket "bucket".

    python -m tests.programs.gcs_emulator PORT

It prints "up" once it answers, and ends by itself after ten minutes.

The emulator sends no generation with a file, as Google's store does. A run on a busy machine failed
once with tensorstore's "Malformed StorageGeneration" when it replaced a manifest that it had read.
The missing generation is the likely cause, so this program sends it.
"""

import sys
import time

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

download = objects.download


def download_with_generation(request, response, storage, *args, **kwargs):
    try:
        params = request.params
        resource = storage.get_file_obj(params["bucket_name"], params["object_id"])
        response["x-goog-generation"] = resource["generation"]
    except NotFound:
        pass  # the emulator answers it
    download(request, response, storage, *args, **kwargs)


if __name__ == "__main__":
    objects.download = download_with_generation
    from gcp_storage_emulator.server import create_server  # it copies the handlers

    server = create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket")
    server.start()
    print("up", flush=True)
    time.sleep(600)
