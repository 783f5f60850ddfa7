//! Base64 of 32 bytes (RFC 4648, section 4, with padding), canonical in both directions.

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
/// Of 32 bytes: 10 groups of three, and one of two with a padding character.
const LENGTH: usize = 44;

pub(super) fn encode(bytes: &[u8; 32]) -> String {
    let mut text = String::with_capacity(LENGTH);
    for group in bytes.chunks(3) {
        let value =
            group.iter().fold(0, |value, byte| value << 8 | usize::from(*byte)) << (8 * (3 - group.len()));
        for digit in 0..=group.len() {
            text.push(char::from(ALPHABET[value >> (18 - 6 * digit) & 63]));
        }
    }
    text.push('=');
    text
}

/// The 32 bytes of exactly the text that [`encode`] gives for them.
pub(super) fn decode(text: &str) -> Option<[u8; 32]> {
    let mut bytes = Vec::with_capacity(33);
    for group in text.strip_suffix('=').filter(|digits| digits.len() == LENGTH - 1)?.as_bytes().chunks(4) {
        let mut value = 0;
        for character in group {
            let digit = ALPHABET.iter().position(|known| known == character)?;
            value = value << 6 | u32::try_from(digit).ok()?;
        }
        value <<= 6 * (4 - group.len());
        bytes.extend_from_slice(&value.to_be_bytes()[1..group.len()]);
    }
    let bytes = bytes.try_into().ok()?;
    (encode(&bytes) == text).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_base64_of_everybody() {
        // printf '\377%.0s' $(seq 32) | base64, and head -c 32 /dev/zero | base64
        assert_eq!(encode(&[255; 32]), "//////////////////////////////////////////8=");
        assert_eq!(encode(&[0; 32]), "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=");
        // printf 'abcdefghijklmnopqrstuvwxyz012345' | base64
        let text = "YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXowMTIzNDU=";
        assert_eq!(encode(b"abcdefghijklmnopqrstuvwxyz012345"), text);
        assert_eq!(decode(text).as_ref(), Some(b"abcdefghijklmnopqrstuvwxyz012345"));
    }

    #[test]
    fn only_the_canonical_form_is_read() {
        for bad in [
            "",
            "=",
            "YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXowMTIzNDU",
            "YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXowMTIzNDV=",
            "YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXowMTIzNDU==",
            "YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXowMTIz_DU=",
            "YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXowMTIzNDUé",
        ] {
            assert_eq!(decode(bad), None, "{bad:?}");
        }
    }
}
