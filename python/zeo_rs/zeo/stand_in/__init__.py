"""What ``ZEO`` is after a take-over where ZEO is not installed: a place for ``component.xml``. The names come from
``zeo_rs.zeo``; this file is never run."""
