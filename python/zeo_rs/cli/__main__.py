import sys

from zeo_rs.cli import main

sys.exit(main())
