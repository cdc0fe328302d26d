"""The tables of the tiny model: each row's clips are made, judged and kept."""
