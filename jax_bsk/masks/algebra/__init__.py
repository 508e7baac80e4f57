"""The lazy algebra: `Mask`, its operators, and the masks that they combine. It knows nothing of how lists are made."""
