"""Log lines as JSON, one object a line, for containers."""

import json
import logging
import time


class JSONFormatter(logging.Formatter):
    def format(self, record):
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + ".%03dZ" % record.msecs,
            "level": record.levelname,
            "logger": record.name,
            "message": getattr(record, "zeo_rs_message", None) or record.getMessage(),
        }
        # client, label, storage, ... of a line from the layers in Rust
        for name, value in getattr(record, "zeo_rs_fields", {}).items():
            line.setdefault(name, value)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
