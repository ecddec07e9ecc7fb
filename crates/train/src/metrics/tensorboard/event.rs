//! TensorBoard's event records: four messages of protobuf in TFRecord's frame.

/// One event.
///
/// # Source
/// tensorboard, `compat/proto/event.proto` and `compat/proto/summary.proto`.
pub(super) struct Event {
    /// Seconds since 1970.
    pub(super) wall_time: f64,
    pub(super) step: u64,
    pub(super) what: What,
}

/// What an event tells.
pub(super) enum What {
    /// The first record of every file.
    Version,
    /// A session starts: readers forget everything from this step on.
    Start,
    /// Figures with their tags.
    Scalars(Vec<(String, f32)>),
}

impl Event {
    /// The event in its frame: length, its checksum, the message, its checksum.
    ///
    /// # Source
    /// tensorflow, `core/lib/io/record_writer.h`.
    pub(super) fn record(&self) -> Vec<u8> {
        let message = self.message();
        let len = (message.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(message.len() + 16);
        record.extend(len);
        record.extend(masked_crc(&len).to_le_bytes());
        record.extend(&message);
        record.extend(masked_crc(&message).to_le_bytes());
        record
    }

    fn message(&self) -> Vec<u8> {
        let mut event = Message::default();
        event.fixed64(1, self.wall_time.to_bits());
        if self.step > 0 {
            event.varint(2, self.step);
        }
        match &self.what {
            What::Version => event.bytes(3, b"brain.Event:2"),
            What::Start => {
                let mut session = Message::default();
                session.varint(1, 1); // SessionLog.SessionStatus.START
                event.bytes(7, &session.0);
            }
            What::Scalars(scalars) => {
                let mut summary = Message::default();
                for (tag, value) in scalars {
                    let mut scalar = Message::default();
                    scalar.bytes(1, tag.as_bytes());
                    scalar.fixed32(2, value.to_bits());
                    summary.bytes(1, &scalar.0);
                }
                event.bytes(5, &summary.0);
            }
        }
        event.0
    }
}

/// A protobuf message that is being written.
///
/// # Source
/// <https://protobuf.dev/programming-guides/encoding/>
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, field: u64, value: u64) {
        self.put(field << 3);
        self.put(value);
    }

    fn fixed64(&mut self, field: u64, bits: u64) {
        self.put(field << 3 | 1);
        self.0.extend(bits.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.put(field << 3 | 2);
        self.put(bytes.len() as u64);
        self.0.extend(bytes);
    }

    fn fixed32(&mut self, field: u64, bits: u32) {
        self.put(field << 3 | 5);
        self.0.extend(bits.to_le_bytes());
    }

    /// Seven bits to a byte, the lowest first, the eighth says that more come.
    fn put(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

/// TFRecord rotates and shifts the checksum, because files of records are checksummed themselves.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), reflected: polynomial `0x1EDC6F41`.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = table();
    let next = |crc: u32, byte: &u8| TABLE[(crc as u8 ^ byte) as usize] ^ crc >> 8;
    !bytes.iter().fold(!0, next)
}

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let (mut crc, mut bit) = (index as u32, 0);
        while bit < 8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3720, appendix B.4.
    #[test]
    fn the_checksum_is_castagnolis() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn long_numbers_take_many_bytes() {
        let mut message = Message::default();
        message.varint(2, 300);
        assert_eq!(message.0, [0x10, 0xac, 0x02]);
    }
}
