"""Files on other machines: read by ranges, kept in a cache on this one."""
