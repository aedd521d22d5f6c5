"""Put on the path of a process under test, it has everything logged there is, by Fallow and by what Fallow stands on."""

import logging
import sys

logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
logging.debug("everything is logged")
