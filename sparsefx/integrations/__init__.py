"""Callbacks for training frameworks; each file needs its framework, none of which sparsefx depends on."""
