package conformance

import (
	"slices"
	"strconv"
	"strings"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/filters"
	"google.golang.org/grpc/codes"
)

// oracle filters as containerd does, with containerd's own parser.
func oracle(infos []*snapshotsapi.Info, list []string) ([]string, error) {
	filter, err := filters.ParseAll(list...)
	if err != nil {
		return nil, err
	}
	out := []string{}
	for _, i := range infos {
		info := proxy.InfoFromProto(i)
		if filter.Match(filters.AdapterFunc(func(path []string) (string, bool) { return field(info, path) })) {
			out = append(out, info.Name)
		}
	}
	slices.Sort(out)
	return out, nil
}

// field is what a filter can see of a snapshot.
func field(info snapshots.Info, path []string) (string, bool) {
	switch {
	case len(path) == 0:
		return "", false
	case path[0] == "name":
		return info.Name, true
	case path[0] == "parent":
		return info.Parent, true
	case path[0] == "kind":
		return strings.ToLower(info.Kind.String()), true
	case path[0] == "labels":
		v, ok := info.Labels[strings.Join(path[1:], ".")]
		return v, ok
	}
	return "", false
}

// TestFilters lists with good and bad filters and compares with containerd's parser.
func TestFilters(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := family(t)
	ref := "sha256:" + strings.Repeat("0a", 32)
	for key, labels := range map[string]map[string]string{
		"plain":                       {"a": "1", "b": "2", "a.b": "dotted", "a.b.c": "more"},
		"slash/and space":             {"containerd.io/gc.root": "now", "containerd.io/snapshot.ref": ref},
		`quo"te, back\slash`:          {`we"ird`: `va"lue`, "comma": "a,b"},
		"new\nline":                   {"line": "one\ntwo", "tab": "a\tb"},
		"\u00fcml\u00e4ut \U0001f680": {"uni": "gr\u00fc\u00df"},
		"UPPER":                       {"a": "x", "A": "X", "_under": "1", "9": "nine"},
		"regexp":                      {"v": "abc123", "path": "/usr/bin"},
	} {
		_, err := s.prepare(key, "top", labels)
		must(t, err)
	}
	infos, err := s.list()
	must(t, err)

	check := func(list ...string) {
		t.Helper()
		want, oracleErr := oracle(infos, list)
		got, err := s.list(list...)
		if oracleErr != nil {
			wantCode(t, "List with "+strings.Join(list, " | "), err, codes.InvalidArgument)
			return
		}
		if err != nil {
			t.Errorf("List(%q): %v", list, err)
			return
		}
		names := []string{}
		for _, i := range got {
			names = append(names, i.GetName())
		}
		slices.Sort(names)
		if !slices.Equal(names, want) {
			t.Errorf("List(%q) shows %q, want %q", list, names, want)
		}
	}

	// The one filter that containerd's metadata layer sends.
	check(`labels."containerd.io/snapshot.ref"==` + ref + `,parent=="top"`)
	check(`labels."containerd.io/snapshot.ref"==` + ref + `,parent==""`)

	for _, f := range []string{
		"", "name", "parent", "kind", "labels", "labels.a", "nothing", "nothing.a", "created_at", "name.x", "kind.x.y",
		"kind==active", "kind==view", "kind==committed", "kind==Active", "kind==unknown", "kind!=active", "kind~=iv",
		"name==base", "name!=base", "name==", `name==""`, "name~=^b", "name~=a", "name~=[", `name~="["`, "name==slash/and", "parent==top",
		`parent==""`, `parent!=""`, "parent==base", "name==base,parent==top", "kind==active,parent==top", "kind==active,parent==top,labels.a",
		"labels.a==1", "labels.a!=1", "labels.a~=^[0-9]$", "labels.a.b==dotted", "labels.a.b.c", `labels."a.b"==dotted`, `labels."a"."b"==dotted`,
		`labels."containerd.io/gc.root"`, `labels."containerd.io/gc.root"==now`, "labels.containerd.io/gc.root",
		`labels."we\"ird"=="va\"lue"`, `labels.comma=="a,b"`, "labels.comma==a,b", `labels.line=="one\ntwo"`, `labels.tab=="a\tb"`,
		`name=="new\nline"`, `name=="quo\"te, back\\slash"`, `name=="\u00fcml\u00e4ut \U0001f680"`, "name==\u00fcml\u00e4ut",
		"labels.uni==gr\u00fc\u00df", `labels.uni=="gr\xc3\xbc\xc3\x9f"`, `name=='base'`, "name==`base`",
		"labels.A==X", "labels._under==1", "labels.9==nine", "9", "_",
		"labels.v~=/abc[0-9]+/", "labels.v~=|^abc|", "labels.v~=\"c1\"", "labels.v~=/", "labels.v~=//", "labels.path~=/\\/usr/", "labels.path==/usr/bin",
		"labels.path~=|/usr/.*|", "labels.v==/abc/", "labels.v==|abc|", "labels.v~=(?i)ABC", `labels.v~=\d+`, `labels.v~="\\d+"`,
		"labels.missing!=x", "labels.missing==", `labels.missing==""`, `labels.missing~=""`, `labels.missing~=.*`, "labels.missing~=x",
		" name==base", "name ==base", "name== base", "name==base ", "name==base, parent", "name==base ,parent", "\tname", "name==a b",
		// Not filters.
		"=", "==", "==x", "name=", "name=x", "name==base,", ",name", ",", ",,", "name!", "name~", "name~x", "name!x", "name==\"open", "\"open",
		"name.", ".name", "labels..a", "labels.", "name===x", "name==x=y", "name==a==b", "name<x", "name>x", "(name)", "name*", "name==x,,kind",
		"labels.a/b", "labels.a-b", "labels/a", "-", "/", "\"", `""`, `"".a`, `labels.""`, `name=="\q"`, `name=="\x"`, "name==\"a\nb\"", "name\x00", "name==\x00",
		"\u00fc", "\U0001f680==x", "name\n==base", strings.Repeat("name,", 2000) + "name", strings.Repeat("x", 32<<10), strings.Repeat("labels.", 5000) + "a",
		"name~=" + strings.Repeat("(", 5000), "name~=(a*)*b", "name~=a{1,1000}",
	} {
		check(f)
	}
	check("kind==view", "name==base")
	check("kind==view", "kind==view")
	check("name==nobody", "")
	check("name==base", "=")
	check("", "")

	// A value can hold anything a name can, once it is quoted.
	for _, i := range infos {
		check("name==" + quoted(i.GetName()))
		for k, v := range i.GetLabels() {
			check("labels." + quoted(k) + "==" + quoted(v))
			check("labels." + quoted(k) + "!=" + quoted(v) + ",name")
		}
	}
	s.wantNames(t, append([]string{"plain", "slash/and space", `quo"te, back\slash`, "new\nline",
		"\u00fcml\u00e4ut \U0001f680", "UPPER", "regexp"}, familyNames...)...)
}

// quoted quotes as %q does, which is what containerd's metadata layer uses.
func quoted(s string) string {
	return strconv.Quote(s)
}
