//! The user and the groups that a container's program runs with.
//!
//! An image config names them as `user[:group]`, by name or by number (image-spec config.md, `User`). Names are those of
//! the image's own `/etc/passwd` and `/etc/group`. Lines that do not have the form of these files (passwd(5), group(5)) are
//! passed over, as the C library does.

use std::collections::BTreeSet;

/// Why a user cannot be found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AccountError {
    /// The image has no user of this name.
    #[error("the image has no user {name:?} in its /etc/passwd")]
    NoUser {
        /// The name, which is no number.
        name: String,
    },
    /// The image has no group of this name.
    #[error("the image has no group {name:?} in its /etc/group")]
    NoGroup {
        /// The name, which is no number.
        name: String,
    },
}

/// Who a program runs as.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Account {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Further groups, in ascending order.
    pub groups: Vec<u32>,
    /// Home directory, if the image says one.
    pub home: Option<String>,
}

impl Account {
    /// Finds the account for `user[:group]`. `passwd` and `group` are the image's files; a file that the image does not have
    /// is empty. An empty `user` is root.
    ///
    /// If a group is named, the account has only that group. Otherwise it has the groups that the files give to the user.
    pub fn find(user: &str, passwd: &[u8], group: &[u8]) -> Result<Self, AccountError> {
        let (user, named_group) = match user.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (user, None),
        };
        let user = if user.is_empty() { "0" } else { user };
        let number: Option<u32> = user.parse().ok();
        let known = lines(passwd)
            .filter_map(PasswdLine::parse)
            .find(|line| line.name == user || Some(line.uid) == number);
        let mut account = match (&known, number) {
            (Some(line), _) => Self {
                uid: line.uid,
                gid: line.gid,
                groups: Vec::new(),
                home: Some(line.home.to_owned()).filter(|home| !home.is_empty()),
            },
            // The files need not know a number.
            (None, Some(uid)) => Self { uid, ..Self::default() },
            (None, None) => return Err(AccountError::NoUser { name: user.to_owned() }),
        };
        let groups = || lines(group).filter_map(GroupLine::parse);
        match (named_group, known) {
            (Some(name), _) => {
                let number = name.parse().ok();
                let known = groups().find(|line| line.name == name || Some(line.gid) == number);
                let gid = known.map(|line| line.gid).or(number);
                account.gid = gid.ok_or_else(|| AccountError::NoGroup { name: name.to_owned() })?;
            }
            (None, Some(line)) => {
                let has_user = |group: &GroupLine<'_>| group.members.split(',').any(|member| member == line.name);
                let further: BTreeSet<u32> = groups().filter(has_user).map(|group| group.gid).collect();
                account.groups = further.into_iter().filter(|&gid| gid != account.gid).collect();
            }
            (None, None) => {}
        }
        Ok(account)
    }
}

/// Returns the lines of a file that are text.
fn lines(file: &[u8]) -> impl Iterator<Item = &str> {
    file.split(|&byte| byte == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok())
}

/// A line of `/etc/passwd`: `name:password:uid:gid:comment:home:shell`.
struct PasswdLine<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> PasswdLine<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let mut number = |n| fields.nth(n)?.parse().ok();
        let (uid, gid) = (number(1)?, number(0)?);
        let home = fields.nth(1).unwrap_or_default();
        Some(Self { name, uid, gid, home })
    }
}

/// A line of `/etc/group`: `name:password:gid:member,member`.
struct GroupLine<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> GroupLine<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = fields.nth(1)?.parse().ok()?;
        let members = fields.next().unwrap_or_default();
        Some(Self { name, gid, members })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"# a comment\nroot:x:0:0:root:/root:/bin/sh\nbroken\nwww:x:33:33::/var/www:/bin/false\r\n\
        \xff\xfe:x:1:1:::\nnode:x:1000:1000:Node:/home/node\n1234:x:77:78::/n:\nnohome:x:5:6\n";
    const GROUP: &[u8] =
        b"root:x:0:\nwww:x:33:\nvideo:x:44:node,www\naudio:x:29:other,node\nnode:x:1000:node\n:x:9:node\nbad:x:no:node\n";

    fn find(user: &str) -> Result<Account, AccountError> {
        Account::find(user, PASSWD, GROUP)
    }

    fn account(uid: u32, gid: u32, groups: &[u32], home: Option<&str>) -> Account {
        Account {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.map(str::to_owned),
        }
    }

    #[test]
    fn names_and_numbers() {
        for (user, expected) in [
            ("", account(0, 0, &[], Some("/root"))),
            (":", account(0, 0, &[], Some("/root"))),
            ("node", account(1000, 1000, &[29, 44], Some("/home/node"))),
            ("1000", account(1000, 1000, &[29, 44], Some("/home/node"))),
            ("node:", account(1000, 1000, &[29, 44], Some("/home/node"))),
            ("node:video", account(1000, 44, &[], Some("/home/node"))),
            ("node:7", account(1000, 7, &[], Some("/home/node"))),
            (":44", account(0, 44, &[], Some("/root"))),
            ("4000", account(4000, 0, &[], None)),
            ("4000:4000", account(4000, 4000, &[], None)),
            ("nohome", account(5, 6, &[], None)),
            // A name may look like a number.
            ("1234", account(77, 78, &[], Some("/n"))),
        ] {
            assert_eq!(find(user), Ok(expected), "{user}");
        }
    }

    #[test]
    fn unknown_names() {
        let name = || "nobody".to_owned();
        assert_eq!(find("nobody"), Err(AccountError::NoUser { name: name() }));
        assert_eq!(find("node:nobody"), Err(AccountError::NoGroup { name: name() }));
        assert!(find("4294967296").is_err());
        assert!(find("-1").is_err());
        assert_eq!(Account::find("0", b"", b""), Ok(account(0, 0, &[], None)));
    }
}
