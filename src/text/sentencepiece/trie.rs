//! A byte trie over pieces.

use std::collections::VecDeque;
use std::ops::Range;

/// Keys and the ids they stand for. Nodes lie breadth first, the children of one side by side in order of their bytes.
#[derive(Debug)]
pub(super) struct Trie {
    nodes: Vec<Node>,
    /// The byte that leads to each node: apart from the nodes, so that few lines of memory hold those of all children.
    bytes: Vec<u8>,
    /// Of the nodes with most children, by byte: the number of the child, from 1 on, or 0.
    tables: Vec<[u16; 256]>,
}

#[derive(Debug, Clone)]
struct Node {
    /// [`NO_ID`] where no key ends.
    id: u32,
    children_start: u32,
    /// At most 256.
    children_len: u16,
    /// Of [`Trie::tables`]; [`NO_TABLE`] where it has none.
    table: u16,
}

/// Up to so many children are looked at one by one: most nodes have one or none.
const FEW_CHILDREN: usize = 6;
/// So many tables are made at most, 2 MB; past them children are searched.
const MAX_TABLES: usize = 1 << 12;
const NO_TABLE: u16 = u16::MAX;
const NO_ID: u32 = u32::MAX;

impl Trie {
    /// A trie of keys that are not empty; of equal keys one is kept. At most 2^32 - 2 bytes in all, which a file of the
    /// size that is read cannot exceed, and no id of 2^32 - 1.
    pub(super) fn new<'a>(keys: impl Iterator<Item = (&'a [u8], u32)>) -> Trie {
        let mut keys: Vec<(&[u8], u32)> = keys.filter(|(key, _)| !key.is_empty()).collect();
        keys.sort_unstable();
        keys.dedup_by_key(|(key, _)| *key);
        let empty = Node { id: NO_ID, children_start: 0, children_len: 0, table: NO_TABLE };
        let mut trie = Trie { bytes: vec![0], nodes: vec![empty.clone()], tables: Vec::new() };
        // Nodes whose children are to be made: which keys pass through them, and how many bytes lead to them.
        let mut open: VecDeque<(usize, Range<usize>, usize)> = VecDeque::from([(0, 0..keys.len(), 0)]);
        while let Some((node, through, depth)) = open.pop_front() {
            let start = trie.nodes.len();
            let mut from = through.start;
            while from < through.end {
                // A key that ends here comes first and is not among the children's.
                let Some(byte) = keys[from].0.get(depth).copied() else {
                    trie.nodes[node].id = keys[from].1;
                    from += 1;
                    continue;
                };
                let same = keys[from..through.end].partition_point(|(key, _)| key.get(depth) == Some(&byte));
                open.push_back((trie.nodes.len(), from..from + same, depth + 1));
                trie.bytes.push(byte);
                trie.nodes.push(empty.clone());
                from += same;
            }
            let children = &trie.bytes[start..];
            trie.nodes[node].children_start = start as u32;
            trie.nodes[node].children_len = children.len() as u16;
            // The root is asked about every byte of a text.
            if (node == 0 || children.len() > FEW_CHILDREN) && trie.tables.len() < MAX_TABLES {
                let mut table = [0; 256];
                for (index, byte) in children.iter().enumerate() {
                    table[usize::from(*byte)] = index as u16 + 1;
                }
                trie.nodes[node].table = trie.tables.len() as u16;
                trie.tables.push(table);
            }
        }
        trie
    }

    /// Calls `found` with all keys `text` starts with, short ones first: their length and id.
    #[inline(always)]
    pub(super) fn prefixes(&self, text: &[u8], mut found: impl FnMut(usize, u32)) {
        let mut node = &self.nodes[0];
        for (index, byte) in text.iter().enumerate() {
            let Some(child) = self.child(node, *byte) else { return };
            node = child;
            if node.id != NO_ID {
                found(index + 1, node.id);
            }
        }
    }

    /// The length of the longest key `text` starts with.
    #[inline]
    pub(super) fn longest(&self, text: &[u8]) -> Option<usize> {
        let mut longest = None;
        self.prefixes(text, |len, _| longest = Some(len));
        longest
    }

    /// Whether a key starts with this byte.
    pub(super) fn has_first(&self, byte: u8) -> bool {
        self.child(&self.nodes[0], byte).is_some()
    }

    #[inline(always)]
    fn child(&self, node: &Node, byte: u8) -> Option<&Node> {
        let start = node.children_start as usize;
        let index = if let Some(table) = self.tables.get(usize::from(node.table)) {
            usize::from(table[usize::from(byte)]).checked_sub(1)?
        } else {
            match &self.bytes[start..start + usize::from(node.children_len)] {
                [] => return None,
                [only] => (*only == byte).then_some(0)?,
                bytes if bytes.len() <= FEW_CHILDREN => bytes.iter().position(|child| *child == byte)?,
                bytes => bytes.binary_search(&byte).ok()?,
            }
        };
        self.nodes.get(start + index)
    }
}
