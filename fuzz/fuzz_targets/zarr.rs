#![no_main]

aotron_fuzz::target!(zarr, repair: aotron_fuzz::repair::tar);
