"""A Ray of this machine's own, which lives for as long as the one that started it. A process of its own, so that the
watcher can end all of Ray with it. It runs by path.

On its standard input stands a line of JSON: ``cpus`` and ``gpus`` (null: those that Ray sees), ``folder`` for all that
Ray writes, and ``address_file``, into which goes where Ray is. Its variables keep Ray to loopback, behind a token.
"""

import json
import os
import sys

# The least that Ray takes; nothing of ours lies in its store.
_OBJECT_STORE_BYTES = 80 * 2**20


def main() -> None:
    about = json.loads(sys.stdin.buffer.readline())
    import ray

    ray.init(
        address="local",
        num_cpus=about["cpus"],
        num_gpus=about["gpus"],
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=about["folder"],
    )
    part = about["address_file"] + ".part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(ray.get_runtime_context().gcs_address)
    os.replace(part, about["address_file"])
    sys.stdin.buffer.read()
    ray.shutdown()


if __name__ == "__main__":
    main()
