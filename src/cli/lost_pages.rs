//! Ends the program with a sentence where a file that is mapped loses pages.
//!
//! Weights are read by the pages that are touched. Where somebody has shortened the file meanwhile, or a disk or a network
//! file system fails, the system sends SIGBUS, which by default ends a program without a word.

use std::ptr;

/// In front of the file's path.
const BEFORE: &[u8] = b"error: cannot read ";
/// After it.
const AFTER: &[u8] =
    b": it was shortened or written to while it was in use, or its disk failed; replace a package by renaming \
    a new one to its place, or start with --copy-weights, which reads the weights once\n";
/// Bytes of `/proc/self/maps` that are read at once.
const PIECE_BYTES: usize = 2048;
/// Longest line that is read: addresses, permissions and a path.
const LINE_BYTES: usize = 4096 + 128;

/// Installs the handler. To be called once, before there are other threads.
#[allow(unsafe_code)]
pub fn install() {
    // SAFETY: all zeros is a valid `sigaction`, the handler has the signature that SA_SIGINFO asks for and calls nothing but
    // what signal-safety(7) lists, and the struct outlives the call.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGBUS, &action, ptr::null_mut());
    }
}

/// Names the file whose page was lost and ends the program. Any other SIGBUS ends it as if there were no handler.
#[allow(unsafe_code)]
extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid `siginfo_t`, and `si_addr` is set for SIGBUS.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    let mut line = Line::default();
    if code == libc::BUS_ADRERR && line.find(address) {
        write(BEFORE);
        write(line.path());
        write(AFTER);
        // SAFETY: `_exit` runs nothing of this program any more.
        unsafe { libc::_exit(1) }
    }
    // SAFETY: as in `install`. On return the access is made again, now with the default action.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(signal, &action, ptr::null_mut());
    }
}

#[allow(unsafe_code)]
fn write(bytes: &[u8]) {
    // SAFETY: the pointer and the length are those of a slice. There is nobody to tell of a failure.
    unsafe { libc::write(libc::STDERR_FILENO, bytes.as_ptr().cast(), bytes.len()) };
}

/// A line of `/proc/self/maps`, in memory that needs no allocator.
struct Line {
    bytes: [u8; LINE_BYTES],
    length: usize,
}

impl Default for Line {
    fn default() -> Line {
        Line { bytes: [0; LINE_BYTES], length: 0 }
    }
}

impl Line {
    /// Reads lines up to that of the mapped file that holds `address`; returns false if there is none.
    #[allow(unsafe_code)]
    fn find(&mut self, address: usize) -> bool {
        // SAFETY: the path ends with NUL.
        let maps = unsafe { libc::open(c"/proc/self/maps".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
        let mut piece = [0_u8; PIECE_BYTES];
        loop {
            // SAFETY: the pointer and the length are those of an array; a descriptor that is not open is refused.
            let read = unsafe { libc::read(maps, piece.as_mut_ptr().cast(), PIECE_BYTES) };
            let Some(read) = usize::try_from(read).ok().filter(|read| *read > 0) else { return false };
            for byte in piece.iter().take(read) {
                if *byte != b'\n' {
                    self.push(*byte);
                } else if self.holds(address) {
                    return !self.path().is_empty();
                } else {
                    self.length = 0;
                }
            }
        }
    }

    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.length) {
            // A path may hold what a terminal would obey.
            *place = if byte.is_ascii_control() { b'?' } else { byte };
            self.length += 1;
        }
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    /// Returns true if `address` is in the range that the line begins with: `START-END`, hexadecimal.
    fn holds(&self, address: usize) -> bool {
        let mut ends = [0_usize; 2];
        let mut at = 0;
        for byte in self.bytes() {
            match (char::from(*byte).to_digit(16), ends.get_mut(at)) {
                (Some(digit), Some(end)) => *end = (*end << 4) | digit as usize,
                (None, _) if *byte == b'-' => at += 1,
                _ => break,
            }
        }
        (ends[0]..ends[1]).contains(&address)
    }

    /// The path at the line's end; empty for memory without a file.
    fn path(&self) -> &[u8] {
        let start = self.bytes().iter().position(|byte| *byte == b'/');
        self.bytes().get(start.unwrap_or(self.length)..).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Line {
        let mut line = Line::default();
        text.bytes().for_each(|byte| line.push(byte));
        line
    }

    #[test]
    fn a_line_of_maps_is_read() {
        let found = line("7f1000-7f3000 r--s 00000000 fe:00 42                    /a/my engine\u{1b}[2J");
        assert!(found.holds(0x7f1000) && found.holds(0x7f2fff) && !found.holds(0x7f3000) && !found.holds(0x7f0fff));
        assert_eq!(found.path(), b"/a/my engine?[2J");
        assert_eq!(line("7f1000-7f3000 rw-p 00000000 00:00 0").path(), b"");
        assert_eq!(line(&"f".repeat(10_000)).length, LINE_BYTES);
    }

    #[test]
    fn a_mapped_file_is_found_by_an_address_in_it() {
        let mut found = Line::default();
        assert!(found.find(a_line_of_maps_is_read as fn() as usize), "this program is a mapped file");
        let program = std::env::current_exe().unwrap();
        assert_eq!(std::str::from_utf8(found.path()).unwrap(), program.to_str().unwrap());
        assert!(!Line::default().find(1));
    }
}
