"""The columns of Census-Income (KDD) and their documented values.

The data set comes with `census-income.names`, which lists the values of each column.
Terran Lane and Ronny Kohavi donated it (2000, https://doi.org/10.24432/C5N30T, CC BY
4.0). Categories contain no commas (they were replaced by blanks); ", " is a separator.
"""

from __future__ import annotations

LABEL = "label"
WEIGHT = "weight"  # number of people a row represents; documented as not for training
EDUCATION = "education"
MARITAL_STATUS = "marital stat"
INCOMES = ("- 50000.", "50000+.")
UNKNOWN = "?"

NUMBERS = (
    "age",
    "wage per hour",
    "capital gains",
    "capital losses",
    "dividends from stocks",
    WEIGHT,
    "num persons worked for employer",
    "weeks worked in year",
)

# Missing in the files of 34 columns.
OPTIONAL = (
    "detailed industry recode",
    "detailed occupation recode",
    "reason for unemployment",
    "migration code-change in msa",
    "migration code-change in reg",
    "migration code-move within reg",
    "migration prev res in sunbelt",
    "fill inc questionnaire for veteran's admin",
)


def _listed(*lines: str) -> frozenset[str]:
    return frozenset(name for line in lines for name in line.split(", "))


_YES_NO = _listed("Not in universe, No, Yes")
_COUNTRIES = _listed(
    "Cambodia, Canada, China, Columbia, Cuba, Dominican-Republic, Ecuador",
    "El-Salvador, England, France, Germany, Greece, Guatemala, Haiti",
    "Holand-Netherlands, Honduras, Hong Kong, Hungary, India, Iran, Ireland, Italy",
    "Jamaica, Japan, Laos, Mexico, Nicaragua, Outlying-U S (Guam USVI etc), Panama",
    "Peru, Philippines, Poland, Portugal, Puerto-Rico, Scotland, South Korea",
    "Taiwan, Thailand, Trinadad&Tobago, United-States, Vietnam, Yugoslavia",
    UNKNOWN,
)

CATEGORIES: dict[str, frozenset[str]] = {
    "class of worker": _listed(
        "Not in universe, Federal government, Local government, Never worked, Private",
        "Self-employed-incorporated, Self-employed-not incorporated",
        "State government, Without pay",
    ),
    "detailed industry recode": frozenset(str(code) for code in range(52)),
    "detailed occupation recode": frozenset(str(code) for code in range(47)),
    EDUCATION: _listed(
        "Children, Less than 1st grade, 1st 2nd 3rd or 4th grade, 5th or 6th grade",
        "7th and 8th grade, 9th grade, 10th grade, 11th grade, 12th grade no diploma",
        "High school graduate, Some college but no degree",
        "Associates degree-occup /vocational, Associates degree-academic program",
        "Bachelors degree(BA AB BS), Masters degree(MA MS MEng MEd MSW MBA)",
        "Prof school degree (MD DDS DVM LLB JD), Doctorate degree(PhD EdD)",
    ),
    "enroll in edu inst last wk": _listed(
        "Not in universe, High school, College or university"
    ),
    MARITAL_STATUS: _listed(
        "Never married, Married-civilian spouse present, Married-spouse absent",
        "Married-A F spouse present, Separated, Divorced, Widowed",
    ),
    "major industry code": _listed(
        "Not in universe or children, Agriculture, Armed Forces",
        "Business and repair services, Communications, Construction, Education",
        "Entertainment, Finance insurance and real estate, Forestry and fisheries",
        "Hospital services, Manufacturing-durable goods",
        "Manufacturing-nondurable goods, Medical except hospital, Mining",
        "Other professional services, Personal services except private HH",
        "Private household services, Public administration, Retail trade",
        "Social services, Transportation, Utilities and sanitary services",
        "Wholesale trade",
    ),
    "major occupation code": _listed(
        "Not in universe, Adm support including clerical, Armed Forces",
        "Executive admin and managerial, Farming forestry and fishing",
        "Handlers equip cleaners etc, Machine operators assmblrs & inspctrs",
        "Other service, Precision production craft & repair",
        "Private household services, Professional specialty, Protective services",
        "Sales, Technicians and related support, Transportation and material moving",
    ),
    "race": _listed(
        "White, Black, Other, Amer Indian Aleut or Eskimo, Asian or Pacific Islander"
    ),
    "hispanic origin": _listed(
        "Mexican (Mexicano), Mexican-American, Puerto Rican",
        "Central or South American, All other, Other Spanish, Chicano, Cuban",
        "Do not know, NA",
    ),
    "sex": _listed("Female, Male"),
    "member of a labor union": _YES_NO,
    "reason for unemployment": _listed(
        "Not in universe, Re-entrant, Job loser - on layoff, New entrant, Job leaver",
        "Other job loser",
    ),
    "full or part time employment stat": _listed(
        "Children or Armed Forces, Full-time schedules, Not in labor force",
        "PT for econ reasons usually FT, PT for econ reasons usually PT",
        "PT for non-econ reasons usually FT, Unemployed full-time",
        "Unemployed part- time",
    ),
    "tax filer stat": _listed(
        "Nonfiler, Joint one under 65 & one 65+, Joint both under 65, Joint both 65+",
        "Single, Head of household",
    ),
    "region of previous residence": _listed(
        "Not in universe, South, Northeast, West, Midwest, Abroad"
    ),
    "state of previous residence": _listed(
        "Not in universe, Abroad, Alabama, Alaska, Arizona, Arkansas, California",
        "Colorado, Connecticut, Delaware, District of Columbia, Florida, Georgia",
        "Idaho, Illinois, Indiana, Iowa, Kansas, Kentucky, Louisiana, Maine, Maryland",
        "Massachusetts, Michigan, Minnesota, Mississippi, Missouri, Montana, Nebraska",
        "Nevada, New Hampshire, New Jersey, New Mexico, New York, North Carolina",
        "North Dakota, Ohio, Oklahoma, Oregon, Pennsylvania, South Carolina",
        "South Dakota, Tennessee, Texas, Utah, Vermont, Virginia, West Virginia",
        "Wisconsin, Wyoming",
        UNKNOWN,
    ),
    "detailed household and family stat": _listed(
        "Child 18+ ever marr Not in a subfamily, Child 18+ ever marr RP of subfamily",
        "Child 18+ never marr Not in a subfamily, Child 18+ never marr RP of subfamily",
        "Child 18+ spouse of subfamily RP, Child <18 ever marr RP of subfamily",
        "Child <18 ever marr not in subfamily, Child <18 never marr RP of subfamily",
        "Child <18 never marr not in subfamily, Child <18 spouse of subfamily RP",
        "Child under 18 of RP of unrel subfamily",
        "Grandchild 18+ ever marr RP of subfamily",
        "Grandchild 18+ ever marr not in subfamily",
        "Grandchild 18+ never marr RP of subfamily",
        "Grandchild 18+ never marr not in subfamily",
        "Grandchild 18+ spouse of subfamily RP",
        "Grandchild <18 ever marr not in subfamily",
        "Grandchild <18 never marr RP of subfamily",
        "Grandchild <18 never marr child of subfamily RP",
        "Grandchild <18 never marr not in subfamily, Householder, In group quarters",
        "Nonfamily householder, Other Rel 18+ ever marr RP of subfamily",
        "Other Rel 18+ ever marr not in subfamily",
        "Other Rel 18+ never marr RP of subfamily",
        "Other Rel 18+ never marr not in subfamily",
        "Other Rel 18+ spouse of subfamily RP, Other Rel <18 ever marr RP of subfamily",
        "Other Rel <18 ever marr not in subfamily",
        "Other Rel <18 never marr child of subfamily RP",
        "Other Rel <18 never marr not in subfamily",
        "Other Rel <18 never married RP of subfamily",
        "Other Rel <18 spouse of subfamily RP, RP of unrelated subfamily",
        "Secondary individual, Spouse of RP of unrelated subfamily",
        "Spouse of householder",
    ),
    "detailed household summary in household": _listed(
        "Child under 18 never married, Child under 18 ever married",
        "Child 18 or older, Group Quarters- Secondary individual, Householder",
        "Nonrelative of householder, Other relative of householder",
        "Spouse of householder",
    ),
    "migration code-change in msa": _listed(
        "Not in universe, Nonmover, MSA to MSA, NonMSA to nonMSA, MSA to nonMSA",
        "NonMSA to MSA, Abroad to MSA, Not identifiable, Abroad to nonMSA",
        UNKNOWN,
    ),
    "migration code-change in reg": _listed(
        "Not in universe, Nonmover, Same county, Different county same state",
        "Different state same division, Abroad, Different region",
        "Different division same region",
        UNKNOWN,
    ),
    "migration code-move within reg": _listed(
        "Not in universe, Nonmover, Same county, Different county same state",
        "Different state in West, Abroad, Different state in Midwest",
        "Different state in South, Different state in Northeast",
        UNKNOWN,
    ),
    "live in this house 1 year ago": _listed(
        "Not in universe under 1 year old, Yes, No"
    ),
    "migration prev res in sunbelt": _YES_NO | {UNKNOWN},
    "family members under 18": _listed(
        "Both parents present, Neither parent present, Mother only present",
        "Father only present, Not in universe",
    ),
    "country of birth father": _COUNTRIES,
    "country of birth mother": _COUNTRIES,
    "country of birth self": _COUNTRIES,
    "citizenship": _listed(
        "Native- Born in the United States",
        "Native- Born in Puerto Rico or U S Outlying",
        "Native- Born abroad of American Parent(s)",
        "Foreign born- Not a citizen of U S",
        "Foreign born- U S citizen by naturalization",
    ),
    "own business or self employed": _listed("0, 1, 2"),
    "fill inc questionnaire for veteran's admin": _YES_NO,
    "veterans benefits": _listed("0, 1, 2"),
    "year": _listed("94, 95"),
}

# All 42, in the order of the official files, which have no header.
OFFICIAL: tuple[str, ...] = (
    "age",
    "class of worker",
    "detailed industry recode",
    "detailed occupation recode",
    EDUCATION,
    "wage per hour",
    "enroll in edu inst last wk",
    MARITAL_STATUS,
    "major industry code",
    "major occupation code",
    "race",
    "hispanic origin",
    "sex",
    "member of a labor union",
    "reason for unemployment",
    "full or part time employment stat",
    "capital gains",
    "capital losses",
    "dividends from stocks",
    "tax filer stat",
    "region of previous residence",
    "state of previous residence",
    "detailed household and family stat",
    "detailed household summary in household",
    WEIGHT,
    "migration code-change in msa",
    "migration code-change in reg",
    "migration code-move within reg",
    "live in this house 1 year ago",
    "migration prev res in sunbelt",
    "num persons worked for employer",
    "family members under 18",
    "country of birth father",
    "country of birth mother",
    "country of birth self",
    "citizenship",
    "own business or self employed",
    "fill inc questionnaire for veteran's admin",
    "veterans benefits",
    "weeks worked in year",
    "year",
    LABEL,
)
