#![no_main]

aotron_fuzz::target!(tar, repair: aotron_fuzz::repair::tar);
