//! The memory of this machine.

/// Bytes of memory that this process can still use: the machine's available memory, or what is left to its control
/// group if that is less; `None` if the system does not report it.
pub fn available_memory_bytes() -> Option<u64> {
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let machine = meminfo("MemAvailable:");
    let group = number("/sys/fs/cgroup/memory.max")
        .zip(number("/sys/fs/cgroup/memory.current"))
        .map(|(most, current)| most.saturating_sub(current));
    machine.into_iter().chain(group).min()
}

/// Total memory of the machine, in bytes; `None` if the system does not report it.
pub fn total_memory_bytes() -> Option<u64> {
    meminfo("MemTotal:")
}

/// A line of /proc/meminfo, which counts in KiB.
fn meminfo(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_tells() {
        let [available, total] = [available_memory_bytes(), total_memory_bytes()].map(Option::unwrap);
        assert!(available > 1 << 20 && available <= total, "{available} of {total}");
    }
}
