//! Numbers in names of files, as we write them there.

/// The number that this text is, in the one form that we write: not `007`, not `+7`.
pub fn parse(text: &str) -> Option<u64> {
    text.parse::<u64>().ok().filter(|number| number.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_form() {
        assert_eq!(
            (parse("0"), parse("7"), parse("18446744073709551615")),
            (Some(0), Some(7), Some(u64::MAX))
        );
        for text in ["", "007", "+7", "-1", "7 ", "7/fs", "x", "18446744073709551616"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }
}
