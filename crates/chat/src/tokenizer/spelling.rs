//! How a vocabulary's strings spell bytes.

/// How a vocabulary's strings spell bytes.
pub(super) enum Spelling {
    /// GPT-2's table of one printable character per byte.
    ByteLevel(Box<ByteLevel>),
    /// `▁` is a space; `<0x0A>` may be a byte.
    SentencePiece { byte_fallback: bool },
    /// As written.
    Plain,
}

impl Spelling {
    /// The bytes of a token that a vocabulary spells so.
    pub(super) fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Spelling::Plain => token.as_bytes().to_vec(),
            Spelling::SentencePiece { byte_fallback } => match fallback_byte(token) {
                Some(byte) if *byte_fallback => vec![byte],
                _ => token.replace('▁', " ").into_bytes(),
            },
            Spelling::ByteLevel(table) => {
                let bytes: Option<Vec<u8>> = token.chars().map(|c| table.byte(c)).collect();
                bytes.unwrap_or_else(|| token.as_bytes().to_vec())
            }
        }
    }
}

fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    match digits.len() {
        2 => u8::from_str_radix(digits, 16).ok(),
        _ => None,
    }
}

/// GPT-2's table: printable Latin-1 stands for itself, the other bytes for
/// the characters from U+0100 on.
pub(super) struct ByteLevel([Option<u8>; 0x144]);

impl ByteLevel {
    pub(super) fn new() -> ByteLevel {
        let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let mut table = [None; 0x144];
        let mut next = 0x100;
        for byte in 0..=u8::MAX {
            let at = match printable(byte) {
                true => usize::from(byte),
                false => {
                    next += 1;
                    next - 1
                }
            };
            table[at] = Some(byte);
        }
        ByteLevel(table)
    }

    fn byte(&self, c: char) -> Option<u8> {
        *self.0.get(c as usize)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(spelling: &Spelling, token: &str, expected: &[u8]) {
        assert_eq!(spelling.bytes(token), expected, "{token:?}");
    }

    #[test]
    fn byte_level_is_a_character_a_byte() {
        let spelling = Spelling::ByteLevel(Box::new(ByteLevel::new()));
        check(&spelling, "Ġthe", b" the");
        check(&spelling, "Ċ", b"\n");
        check(&spelling, "Ã©", "é".as_bytes());
        check(&spelling, "ŃĀ", &[0xAD, 0]);
        check(&spelling, "▁the", "▁the".as_bytes());
    }

    #[test]
    fn sentence_piece_spells_spaces_and_lone_bytes() {
        let fallback = Spelling::SentencePiece {
            byte_fallback: true,
        };
        check(&fallback, "▁a▁b", b" a b");
        check(&fallback, "<0x0A>", b"\n");
        check(&fallback, "<0x0>", b"<0x0>");
        let plain = Spelling::SentencePiece {
            byte_fallback: false,
        };
        check(&plain, "<0x0A>", b"<0x0A>");
    }
}
