"""Vector code: functions that become instructions within compiled functions."""
