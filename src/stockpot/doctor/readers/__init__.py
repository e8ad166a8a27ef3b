"""From files of many kinds to exchanges."""
