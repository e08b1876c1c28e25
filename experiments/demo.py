"""The main job on the embedded simulated catalogue, as the commands a user would type: `semid demo`. No download.

python -m experiments.demo --out runs/demo        # or: make demo
"""

import sys

from semid.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
