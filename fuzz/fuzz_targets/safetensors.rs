#![no_main]

aotron_fuzz::target!(safetensors, repair: aotron_fuzz::repair::safetensors);
