//! Tar archives for tests.

/// An uncompressed ustar archive.
#[derive(Default)]
pub struct Tar {
    bytes: Vec<u8>,
}

impl Tar {
    /// Adds a file.
    pub fn file(&mut self, name: &str, data: &[u8]) -> &mut Tar {
        self.entry(name, b'0', "", data.len() as u64, data)
    }

    /// Adds an entry of any type, with any link target and claimed size.
    pub fn entry(&mut self, name: &str, kind: u8, target: &str, size: u64, data: &[u8]) -> &mut Tar {
        let mut header = [0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        header[136..147].copy_from_slice(b"00000000000");
        header[156] = kind;
        header[157..157 + target.len()].copy_from_slice(target.as_bytes());
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.bytes.extend_from_slice(&header);
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    /// The whole archive.
    pub fn finish(&self) -> Vec<u8> {
        [&self.bytes[..], &[0; 1024]].concat()
    }
}
