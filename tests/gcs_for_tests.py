"""A bucket "bkt" on this machine: python gcs_for_tests.py PORT serves until its input ends."""

import sys

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound

STATUS = server.HTTPStatus


def environment(port):
    """What lets gcsfs and TensorStore use it, without looking for Google."""
    address = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
        "FSSPEC_GCS_TOKEN": "anon",
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


def as_google(handle):
    """A handler that answers conditions on generations, which the emulator leaves out.

    TensorStore tells by them whether somebody else has written.
    """

    def handled(request, response, storage, *args, **kwargs):
        named = {**request.params, **{key: value[0] for key, value in request.query.items()}}
        name = named.get("object_id") or named.get("name")
        try:
            there = storage.get_file_obj(named["bucket_name"], name)["generation"]
        except (KeyError, NotFound):
            there = "0"
        if named.get("ifGenerationMatch", there) != there:
            response.status = STATUS.PRECONDITION_FAILED
        elif named.get("ifGenerationNotMatch") == there:
            response.status = STATUS.NOT_MODIFIED
        else:
            handle(request, response, storage, *args, **kwargs)
        if named.get("alt") == "media":
            response["x-goog-generation"] = there

    return handled


def serve(port):
    """Serves until the standard input ends."""
    for _, handlers in server.HANDLERS:
        for method, handle in handlers.items():
            handlers[method] = as_google(handle)
    bucket = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bkt")
    bucket.start()
    print("serving", flush=True)
    sys.stdin.read()
    bucket.stop()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
