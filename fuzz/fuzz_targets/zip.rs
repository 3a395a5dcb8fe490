#![no_main]

aotron_fuzz::target!(zip, repair: aotron_fuzz::repair::zip);
