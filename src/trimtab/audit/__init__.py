"""Audits of data and adapters. One file an audit; each is a function, and a command below ``trimtab audit``."""
