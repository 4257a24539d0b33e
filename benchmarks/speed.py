"""The same as `python main.py speed`, see `vil_lightning/speed/command.py`.

python benchmarks/speed.py --sizes 224 224/8 512 1024 --work forward train --out benchmarks/results/speed_<hardware>_<date>
"""

import sys

from vil_lightning.speed.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
