#![no_main]

aotron_fuzz::target!(nemo, repair: aotron_fuzz::repair::tar);
