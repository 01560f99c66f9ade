"""A node that stopped while a thread was reading its evidence store ended with a segmentation fault: `close` freed the
connection beneath the query. The store now waits for it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, threading
from pathlib import Path
from node_client.errors import StorageError
from node_client.evidence_store import EvidenceStore

for round_ in range(40):
    store = EvidenceStore(Path(sys.argv[1]) / f"{round_}.sqlite", 1 << 20)
    for number in range(64):
        store.save_grant(number.to_bytes(32), bytes(20_000))
    begun = threading.Barrier(5)

    def read():
        begun.wait()
        try:
            while True:
                store.grants()
        except StorageError:
            pass

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    begun.wait()
    store.close()
    for reader in readers:
        reader.join()
"""


def test_store_that_is_closed_while_others_read_ends_them_with_an_error(tmp_path: Path) -> None:
    # In a process of its own: what went wrong took the whole process with it.
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2_000:]
