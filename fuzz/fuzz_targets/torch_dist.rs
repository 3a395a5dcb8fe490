#![no_main]

aotron_fuzz::target!(torch_dist, repair: aotron_fuzz::repair::tar);
