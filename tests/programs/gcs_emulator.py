"""An in-memory emulator of Google's object store, with the bucket "bucket".

    python -m tests.programs.gcs_emulator PORT

It prints "up" once it answers, and ends by itself after ten minutes.
"""

import sys
import time

from gcp_storage_emulator.server import create_server

if __name__ == "__main__":
    server = create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket")
    server.start()
    print("up", flush=True)
    time.sleep(600)
