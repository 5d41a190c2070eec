"""What `python -m bench` times: a stage in each module, of the same name."""
